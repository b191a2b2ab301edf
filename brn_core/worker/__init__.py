"""The training worker behind `brn-train`."""
