"""What was measured, told: each report is rendered from statistics and expectations alone."""
