# After another config: the same run with its LayerNorms kept, the control.
ln_schedule = []
aux_loss_weight = 0.0  # it only prepares the std for its constant
out_dir = out_dir + "_control"
