"""Looking without training: at a config, at data, at runs and at the parts there are."""
