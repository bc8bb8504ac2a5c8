"""Parts of the fault campaign (`tools/fault_campaign.py`)."""
