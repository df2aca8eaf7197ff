"""From a checkpoint to a model: `from_pretrained` of our classes, placement, quantisation, streaming."""
