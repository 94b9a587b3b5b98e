"""From a model path to a skeleton on the meta device, its tokenizer, and the values its parameters start from."""
