"""Property tests draw the same examples every time; `pytest --hypothesis-profile=explore` draws new and more ones."""

from hypothesis import HealthCheck, settings

common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=15, **common)
settings.register_profile("explore", max_examples=150, **common)
settings.load_profile("ci")
