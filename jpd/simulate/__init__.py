"""The real coordinator, scheduler and controllers in virtual time: steps cost what a model says."""
