"""What the measurements of whole steps share: plans, models, routing, times, traces and floors."""
