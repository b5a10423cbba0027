"""``python -m lrqp_torch`` is the ``lrqp`` command."""

from lrqp_torch.cli import main

main()
