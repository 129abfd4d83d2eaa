"""A host of our own: a Flux-shaped transformer from a .gguf file, a denoising loop and the panel."""
