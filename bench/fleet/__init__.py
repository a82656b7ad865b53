"""How many cards a load needs: the server's own queue and scaling rules on the time of a simulation."""
