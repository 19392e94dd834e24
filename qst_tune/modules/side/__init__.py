"""The side network: gates, downsamplers, blocks and the output mix; all of it trains."""
