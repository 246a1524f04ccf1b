"""What a response claims of a scene, as questions that the toy model was taught to answer."""

from minialign.align.claims import Claim
from minialign.toy.benchmark import DENIED, MENTION
from minialign.toy.world import EXISTS, with_article, yes_or_no


def claims_of(question: str, response: str) -> list[Claim]:
    """A claim for every object that is named, that it is there, or where it is denied that it is
    not.
    """
    claims = []
    denied = " ".join(DENIED.findall(response))
    for there, text in ((True, DENIED.sub("", response)), (False, denied)):
        for name, _ in MENTION.findall(text):
            asked = EXISTS[0].format(with_article(name))
            claims.append(Claim(asked, yes_or_no(name, there), yes_or_no(name, not there)))
    return list(dict.fromkeys(claims))
