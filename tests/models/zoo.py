"""One small model of each of timm's model modules: module, model, arguments that make it smaller, side of the input.

The sweeps over it must see every kind of initialisation and every kind of forward that timm has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest


class Entry(NamedTuple):
    module: str
    name: str
    options: dict[str, Any]


SHALLOW: dict[str, dict[str, Any]] = {
    "beit": {"depth": 3},
    "deepseek_vit": {"depth": 2, "embed_dim": 192, "num_heads": 3},
    "gemma4_vit": {"depth": 3},
    "naflexvit": {},
    "qwen3_vit": {"depth": 3},
    "vision_transformer_sam": {"depth": 3},
    "vision_transformer_hybrid": {"depth": 3},
}

NAMES = """
beit:beit_base_patch16_224 byoanet:eca_botnext26ts_256 byobnet:test_byobnet cait:cait_xxs24_224 coat:coat_tiny
convit:convit_tiny convmixer:convmixer_768_32 convnext:test_convnext cpubone:cpubone_nano crossvit:crossvit_tiny_240
csatv2:csatv2 cspnet:cs3darknet_focus_s cspnext:cspnext_tiny davit:davit_tiny deepseek_vit:deepseek_vit_412m
deit:deit_tiny_patch16_224 densenet:densenet121 dla:dla102x dpn:dpn48b edgenext:edgenext_x_small
efficientformer:efficientformer_l1 efficientformer_v2:efficientformerv2_s0 efficientnet:test_efficientnet
efficientvim:efficientvim_m1 efficientvit_mit:efficientvit_b0 efficientvit_msra:efficientvit_m0
eva:eva02_tiny_patch14_224 fasternet:fasternet_t0 fastvit:fastvit_s12 focalnet:focalnet_tiny_srf gcvit:gcvit_xxtiny
gemma4_vit:gemma4_vit_167m ghostnet:ghostnet_050 hardcorenas:hardcorenas_b hgnet:hgnetv2_b0 hiera:hiera_tiny_224
hieradet_sam2:sam2_hiera_tiny hrnet:hrnet_w18_small iformer:iformer_s inception_next:inception_next_atto
inception_resnet_v2:inception_resnet_v2 inception_v3:inception_v3 inception_v4:inception_v4
lcnetv2:lcnetv2_small levit:levit_128s lowformer:lowformer_b0 mambaout:test_mambaout maxxvit:test_coatnet
metaformer:caformer_s18 mlp_mixer:gmixer_12_224 mobilenetv3:mobilenetv3_small_050 mobilenetv5:mobilenetv5_base
mobilevit:mobilevit_xxs mvitv2:mvitv2_tiny naflexvit:naflexvit_base_patch16_gap nasnet:nasnetalarge nest:nest_tiny_jx
nextvit:nextvit_small nfnet:test_nfnet pit:pit_xs_224 pnasnet:pnasnet5large pvt_v2:pvt_v2_b0 qwen3_vit:qwen3_vit_306m
rdnet:rdnet_tiny regnet:regnetx_002 repghost:repghostnet_050 repvit:repvit_m1 res2net:res2net50_14w_8s
resnest:resnest14d resnet:test_resnet resnetv2:resnetv2_18 rexnet:rexnet_100 selecsls:selecsls42
senet:legacy_seresnet101 sequencer:sequencer2d_s shvit:shvit_s1 sknet:skresnet18 starnet:starnet_s050
swiftformer:swiftformer_xs swin_transformer:swin_tiny_patch4_window7_224 swin_transformer_v2:swinv2_tiny_window16_256
swin_transformer_v2_cr:swinv2_cr_tiny_224 tiny_vit:tiny_vit_11m_224 tnt:tnt_s_legacy_patch16_224 tresnet:tresnet_m
twins:twins_svt_small vgg:vgg11 visformer:visformer_tiny vision_transformer:test_vit
vision_transformer_hybrid:vit_tiny_r_s16_p8_224 vision_transformer_relpos:test_vit_relpos
vision_transformer_sam:samvit_base_patch16_224 vitamin:vitamin_small_224 volo:volo_d1_224
vovnet:ese_vovnet19b_slim_dw xception:legacy_xception xception_aligned:xception41p xcit:xcit_nano_12_p16_224
"""

ZOO = [Entry(module, name, SHALLOW.get(module, {})) for module, name in (pair.split(":") for pair in NAMES.split())]
"""Smallest first entry of every module in ``timm.models`` that registers models."""

SHORT = """
beit cait convnext csatv2 densenet efficientnet eva gemma4_vit hiera levit maxxvit mobilenetv3 nfnet pvt_v2 regnet resnet
resnetv2 swin_transformer swin_transformer_v2 tresnet twins vision_transformer vision_transformer_relpos xcit
"""
"""Modules that are swept over where time is short: the common ones, and those that are built in an unusual way."""
SWEEP = [pytest.param(entry, id=entry.module, marks=[pytest.mark.long] * (entry.module not in SHORT.split())) for entry in ZOO]
