# After another config: the same run with its LayerNorms kept, the control (vanilla).
ln_schedule = []
aux_loss_weight = 0.0
out_dir = out_dir + "_control"
