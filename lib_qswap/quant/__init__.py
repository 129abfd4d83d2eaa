"""What a packed weight is: formats, unpacking, the tensor class, GGUF files."""
