"""The parts of the study, one file each; none knows another."""
