"""How the organism was made: vocabulary, prompts, forward pass with edits, loss, ground truth."""
