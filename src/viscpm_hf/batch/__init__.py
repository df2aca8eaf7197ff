"""Many questions or prompts at once: batched answering, and runs over whole files."""
