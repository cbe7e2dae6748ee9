# After another config: the same run with its LayerNorms kept, the control (vanilla).
ln_schedule = []
out_dir = out_dir + "_control"
