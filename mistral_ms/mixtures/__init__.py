"""Mixtures of experts beside the decoder: on any Cell, on plain regression, on checkpoints.

============  ===============================================================================
module        holds
============  ===============================================================================
experts       E dense layers of one shape as one product
adaptive      Adaptive Mixtures of Local Experts (1991)
multi_gate    Multi-gate Mixture-of-Experts, its baselines and its data
moeify        feed-forwards of any Cell become mixtures, in one line
routed        the layer that it puts in
fastmoe       FastMoE's naive and SWIPE gates
paddle        PaddlePaddle's ``MoELayer``
colossalai    ColossalAI's ``SparseMLP``
naive         the loop over experts that one writes first
lifelong      Lifelong-MoE: a gate in stages, frozen experts, distillation
expand        experts of a checkpoint: add, remove, export, import
transfer      forgetting, forward and backward transfer
domains       random routed experts of PanGu-Sigma; a domain as a model of its own
rewriting     a checkpoint rewritten as data
============  ===============================================================================

Modules are imported one by one.
"""
