"""In the place of transformers' file, which its source distribution lacks."""

# Arguments that every configuration takes, none with its default.
config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 4,
    "dtype": "float16",
    "id2label": {0: "a", 1: "b", 2: "c"},
    "is_encoder_decoder": True,
    "label2id": {"a": 0, "b": 1, "c": 2},
    "name_or_path": "some/model",
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
