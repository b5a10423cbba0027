"""Edits inside vLLM, request by request; nothing of vLLM is imported unless vLLM calls."""
