"""`viscpm-tiny` and its world: pictures of flat shapes, questions about them, prompts to paint them, and checks.

Everything follows from a split (`train`, `validation`, `test`) and an index, see `scene`. `viscpm_hf.shapes` holds its
public names.
"""
