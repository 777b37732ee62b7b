"""A ControlNet compiles in regions, as the UNet does."""

import torch
from legs import LEG, only_patched

pytestmark = only_patched


@torch.no_grad()
def test_controlnet_compiles_in_regions():
    from stock_pipelines import IMAGE, controlnet

    torch._dynamo.reset()
    net = controlnet()
    pooled = net.config.projection_class_embeddings_input_dim - 6 * net.config.addition_time_embed_dim
    prompt = torch.linspace(-1, 1, 7 * net.config.cross_attention_dim).reshape(1, 7, -1)
    call = {
        "encoder_hidden_states": prompt,
        "controlnet_cond": IMAGE,
        "added_cond_kwargs": {"text_embeds": torch.ones(1, pooled), "time_ids": torch.ones(1, 6)},
        "return_dict": False,
    }
    sample = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    expected = net(sample, 7, **call)
    graphs = []
    regions = LEG.compile_regions(net, lambda graph, _: graphs.append(graph) or graph)
    assert {type(region).__name__ for region in regions} == {"BasicTransformerBlock"}
    torch.testing.assert_close(net(sample, 7, **call)[1], expected[1], rtol=0, atol=1e-4)
    assert graphs
