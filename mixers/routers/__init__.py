"""Routers: what decides how badly a token needs to be kept. One file per idea; `base` says what a router is."""
