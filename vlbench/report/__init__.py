"""Tables made from stored results. Pure functions of their input; never torch."""
