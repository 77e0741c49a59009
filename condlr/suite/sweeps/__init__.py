"""Many runs: plan, sweep, estimate and status."""
