"""The kernel lab: every kernel on identical inputs, layer by layer, compared bit by bit and with float64."""
