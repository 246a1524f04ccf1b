"""minialign's programs; --help lists the flags of each.

python sample_bdhs.py                      sample rejected responses by BDHS (Algorithm 1)
python train_dpo.py                        DPO, IPO or SLiC on a pairs file (Eq. 3, Eq. 5)
python train_online.py                     online DPO, mixed DPO (Eq. 4), online BDHS
python -m minialign.rlhf.reward_model      a reward model of preference pairs (Eq. 1)
python -m minialign.rlhf.rloo              RLHF by RLOO (Eq. 2)
python -m minialign.rlhf.ppo               RLHF by PPO (Eq. 2)
python -m minialign.chat                   ask about a picture, or score an answer
python -m minialign.evaluate               CHAIR, POPE, and answers for LLaVA-Bench and MMHal-Bench
python -m minialign.annotate               how good an annotator is; pairs that one has ranked
python -m minialign.toy                    the embedded world as files, its checkpoint anew
python -m minialign.tour                   BDHS and DPO on one picture: a page in eight stations
python -m minialign.study                  the comparison of all methods on the embedded world

Without flags they run on the embedded world; the training programs, the sampler among them, also
under torchrun (torchrun --nproc-per-node 8 train_dpo.py ..., torchrun -m minialign.rlhf.rloo ...).
"""

if __name__ == "__main__":
    print(__doc__)
