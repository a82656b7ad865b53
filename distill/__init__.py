"""The training recipe of the paper: flow teacher, TrigFlow wrap, sCM + LADD, and the tiny world it is proved on."""
