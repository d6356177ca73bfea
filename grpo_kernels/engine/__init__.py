"""How a call is computed: heights and cost, the loops over chunks, the products, the torch.library ops."""
