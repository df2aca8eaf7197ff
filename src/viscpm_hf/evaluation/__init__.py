"""Measuring models: LLaVA-bench with a judge, FID and CLIP score, and the demo world's test sets."""
