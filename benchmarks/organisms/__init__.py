"""How the organisms were made: vocabulary, prompts, forward pass with edits, loss, ground truth."""
