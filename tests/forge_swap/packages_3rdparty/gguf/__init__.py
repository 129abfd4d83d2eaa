from enum import Enum

GGMLQuantizationType = Enum("GGMLQuantizationType", ["F16", "Q4_K"])
