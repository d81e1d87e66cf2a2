"""Real models under real PEFT adapters, where the packages that carry them are installed: ``tox -e real``."""
