"""The OpenAI-compatible endpoint: an ASGI server beside Triton that asks the model tensorrt_llm over gRPC."""
