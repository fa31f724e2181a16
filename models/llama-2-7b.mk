# Meta's Llama 2 7B
include models/shared/llama-2.mk
