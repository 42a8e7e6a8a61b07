"""LMentry (Efrat, Honovich and Levy, Findings of ACL 2023, https://arxiv.org/abs/2211.02069): its rules, our code."""
