"""The only folder that knows Stable Diffusion WebUI Forge."""
