"""What a response claims of a scene, as questions that the toy model was taught to answer."""

from minialign.align.claims import Claim
from minialign.toy.benchmark import DENIED, MENTION
from minialign.toy.world import EXISTS, with_article, yes_or_no


def claims_of(question: str, response: str) -> list[Claim]:
    """One claim for each object: one that is named is there, one that is denied is not. Colours and
    places are not asked about.
    """
    claims = []
    denied = " ".join(DENIED.findall(response))
    for there, text in ((True, DENIED.sub("", response)), (False, denied)):
        for name, _ in MENTION.findall(text):
            asked = EXISTS[0].format(with_article(name))
            claims.append(Claim(asked, yes_or_no(name, there), yes_or_no(name, not there)))
    return list(dict.fromkeys(claims))
