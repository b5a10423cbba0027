"""From texts to tokens: what every task builds on."""
