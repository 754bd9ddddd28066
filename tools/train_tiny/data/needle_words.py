"""The words and filler sentences that needle texts are made of, in English and Chinese.

Invariant: within one table and language no entry occurs twice.
"""

# people
NAMES: dict[str, tuple[str, ...]] = {
    "en": (
        "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo", "Mary",
        "Nick", "Olivia", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Adam", "Bella", "Carl", "Diana",
        "Eric", "Fiona", "George", "Helen", "Ivan",
    ),
    "zh": (
        "王芳", "李伟", "张敏", "刘洋", "陈静", "杨帆", "赵磊", "黄丽", "周杰", "吴婷", "徐强", "孙悦", "马超",
        "朱红", "胡军", "郭琳", "何平", "高峰", "林涛", "罗兰", "郑爽", "梁宇", "谢娜", "宋佳", "唐亮", "许晴",
        "韩雪", "冯刚", "邓超", "曹颖",
    ),
}  # fmt: skip
# colors
COLORS: dict[str, tuple[str, ...]] = {
    "en": (
        "red", "blue", "green", "yellow", "white", "black", "purple", "orange", "silver", "golden", "brown", "pink",
        "gray",
    ),
    "zh": (
        "红色", "蓝色", "绿色", "黄色", "白色", "黑色", "紫色", "橙色", "银色", "金色", "棕色", "粉色", "灰色",
    ),
}  # fmt: skip
# places
PLACES: dict[str, tuple[str, ...]] = {
    "en": (
        "warehouse", "library", "garage", "museum", "station", "school", "hotel", "bank", "farm", "harbor", "tower",
        "bakery", "hospital", "theater", "market",
    ),
    "zh": (
        "仓库", "图书馆", "车库", "博物馆", "车站", "学校", "酒店", "银行", "农场", "码头", "高塔", "面包店",
        "医院", "剧院", "市场",
    ),
}  # fmt: skip
# small things
OBJECTS: dict[str, tuple[str, ...]] = {
    "en": (
        "key", "box", "letter", "ring", "map", "watch", "coin", "book", "lamp", "bottle", "camera", "violin", "hat",
        "mirror", "candle",
    ),
    "zh": (
        "钥匙", "盒子", "信件", "戒指", "地图", "手表", "硬币", "书本", "台灯", "瓶子", "相机", "小提琴", "帽子",
        "镜子", "蜡烛",
    ),
}  # fmt: skip
# hiding places
SPOTS: dict[str, tuple[str, ...]] = {
    "en": (
        "attic", "kitchen", "garden", "cellar", "bedroom", "old barn", "school bus", "red drawer", "town hall",
        "boat house", "train car", "back yard", "clock tower", "tea shop", "post office",
    ),
    "zh": (
        "阁楼", "厨房", "花园", "地下室", "卧室", "旧谷仓", "校车上", "抽屉", "市政厅", "船屋", "车厢", "后院",
        "钟楼", "茶馆", "邮局",
    ),
}  # fmt: skip
# fruit
LIKES: dict[str, tuple[str, ...]] = {
    "en": (
        "apples", "grapes", "mangoes", "cherries", "lemons", "peaches", "plums", "bananas", "melons", "berries",
        "pears", "dates", "figs", "limes", "kiwis",
    ),
    "zh": (
        "苹果", "葡萄", "芒果", "樱桃", "柠檬", "桃子", "李子", "香蕉", "西瓜", "草莓", "梨", "大枣", "无花果",
        "橘子", "荔枝",
    ),
}  # fmt: skip
# weekdays
DAYS: dict[str, tuple[str, ...]] = {
    "en": (
        "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
    ),
    "zh": (
        "星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日",
    ),
}  # fmt: skip
# {name}, {other}, {day}, {place}, {color}, {n} and {h} are filled in
FILLER: dict[str, tuple[str, ...]] = {
    "en": (
        "On {day} {name} walked to the {place} and met {other}.",
        "The {color} bus stopped near the {place} at noon.",
        "{name} and {other} talked about the weather for a while.",
        "It rained on {day}, so the {place} was closed.", "{name} bought {n} tickets for the show on {day}.",
        "A {color} bird sat on the roof of the {place}.", "{name} read {n} pages and then went to sleep.",
        "The people at the {place} were friendly and busy.", "{other} painted the door of the {place} {color}.",
        "After lunch {name} played chess with {other}.", "There were {n} chairs in front of the {place}.",
        "The road to the {place} was long and quiet.", "{name} wrote a letter to {other} but did not send it.",
        "Every {day} the {place} opens at {h} in the morning.",
    ),
    "zh": (
        "{day}，{name}走到{place}，遇见了{other}。", "一辆{color}的汽车中午停在{place}附近。",
        "{name}和{other}聊了一会儿天气。", "{day}下了雨，所以{place}关门了。", "{name}为{day}的演出买了{n}张票。",
        "一只{color}的小鸟停在{place}的屋顶上。", "{name}看了{n}页书，然后睡着了。",
        "{place}里的人都很热情，也很忙。", "{other}把{place}的门刷成了{color}。",
        "午饭后{name}和{other}下了一盘棋。", "{place}前面有{n}把椅子。", "通往{place}的路又长又安静。",
        "{name}给{other}写了一封信，却没有寄出。", "每逢{day}，{place}早上{h}点开门。",
    ),
}  # fmt: skip
