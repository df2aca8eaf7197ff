"""The siblings' conversions by the paths that they are known by; they live in `viscpm_hf.conversion`."""
