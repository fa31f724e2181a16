# Meta's Llama 2 70B, the chat version. Meta's files have no chat template
include models/families/llama-2.mk
TP = 8
CHAT_TEMPLATE = models/llama-2.jinja
