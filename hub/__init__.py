"""The formats of HuggingFace: models on its hub, tokenizers, sentence-transformers, ONNX."""
