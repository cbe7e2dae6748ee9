# After another config: its control, the same run with the LayerNorms kept.
ln_schedule = []
aux_loss_weight = 0.0  # it only prepares the std for its constant
out_dir = out_dir + "_control"
