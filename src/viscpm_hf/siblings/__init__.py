"""OmniLMM-12B, MiniCPM-V 1.0 and 2.0, and VisualCLA: their own interfaces, and their original folders."""
