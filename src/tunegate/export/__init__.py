"""An adapter in another form: merged into its base, or in another tool's format, each with proof."""
