"""What is optimised: advantages, losses, KL estimates and the weights of tokens, all on arrays."""
