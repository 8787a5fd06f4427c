"""CoSA-MS (Tab. 2): networks of other architectures, trained on the pseudo-labels that CoSA exports."""
