"""The original files of OmniLMM-12B, MiniCPM-V 1.0 and 2.0, and VisualCLA-7B."""
