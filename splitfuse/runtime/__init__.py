"""Execute plans on a device: plan its memory, load a model, run steps, sample."""
