"""Parts that stand beside the models: safety checks (and, with VisCPM-Paint, the diffusers pipelines)."""
